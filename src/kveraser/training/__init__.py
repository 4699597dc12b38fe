"""Training erasers: data, objective, loop."""
