"""Protected memory: arenas, holdings, folding, transfer; and the pure functions over what nodes hold."""
