"""The programs between the daemon and a command. They import nothing of ours."""
