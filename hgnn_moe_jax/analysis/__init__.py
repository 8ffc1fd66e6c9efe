"""What finished run folders say. Nothing here is needed to train."""
