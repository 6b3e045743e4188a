"""The cost model: what launches are predicted to take, never measured; without it the rules choose."""
