"""Mix every sample's kernel, W = α·E, then convolve with it."""
