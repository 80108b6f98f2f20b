"""What is minimised: targets as they are normalised, distances, projectors, the shared space, balance."""
