"""What is on disk beside features, read only: plan, samples, teachers, commit records, image records, run records."""
