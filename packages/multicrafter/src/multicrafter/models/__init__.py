"""The models that are trained and drawn with: base models, adapters on them, loading, and what leaves the house."""
