"""Configuration files: strict YAML, overrides from the command line, paths, and the messages of validation."""
