"""Published results that separate these layers, repeated at a size for two cores."""
