"""Grids of runs: every combination of settings and seeds as an ordinary run, and the table that compares them."""
