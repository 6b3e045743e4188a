"""The cost model: what launches are predicted to take. Predictions, never measured; nothing else needs it to run."""
