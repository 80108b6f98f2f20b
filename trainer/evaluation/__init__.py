"""What a trained student knows: measures, probes, controls, runs side by side."""
