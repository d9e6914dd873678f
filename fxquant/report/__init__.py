"""What a person sees: tables, pictures, plots, progress."""
