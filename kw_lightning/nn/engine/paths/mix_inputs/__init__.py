"""Mix for every cell what the mixtures read, U_j = Σ_i α_ij · read_i, then take one dense product, y = Σ_j E_j·U_j."""
