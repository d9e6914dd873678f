"""Images, class names and models that the command line reads, and those that come with the package."""
