"""Everything that is not the model itself."""
