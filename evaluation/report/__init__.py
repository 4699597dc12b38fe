"""`kveraser bench report`: figures and a page of measured runs, made for reading without a network."""
