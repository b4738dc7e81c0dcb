"""Convolve with every cell, Z_j = E_j·x, then mix the results, y = Σ_i shift_i(Σ_j α_ij · Z_j)."""
