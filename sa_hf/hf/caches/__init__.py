"""What layers keep from token to token."""
