"""The API of release 0.6: jobs, their feed, and SockJS."""
