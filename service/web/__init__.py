"""HTTP: the published contracts over one core, and the processes that serve them."""
