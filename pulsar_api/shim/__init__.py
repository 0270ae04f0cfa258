"""The programs between the daemon and a command. They import no other module of ours."""
