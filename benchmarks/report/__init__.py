"""Results: the file, its tables, plots and pages, and their comparison."""
