"""The routes: what clients send becomes calls of the service, and what comes back becomes replies."""
