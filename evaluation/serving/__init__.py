"""`kveraser bench serve`: what the server's promises come to, measured on a server in a process of its own."""
