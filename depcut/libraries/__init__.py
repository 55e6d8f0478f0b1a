"""What is known of model libraries: conventions of a library, never of an architecture."""
