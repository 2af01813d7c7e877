"""What is known of a model and kept on it; stands below everything else here."""
