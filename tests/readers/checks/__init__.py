"""What every reader must do with every export; imported in the readers' environments alone."""
