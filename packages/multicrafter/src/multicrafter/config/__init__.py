"""What a run is: recipes, their values as YAML and from the command line, and where each value comes from."""
