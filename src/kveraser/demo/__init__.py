"""The demo: real documents with a span that has to go, and what every method makes of them."""
