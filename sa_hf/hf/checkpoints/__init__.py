"""What lies in a folder: weights published whole, the code that goes with them, adapters, the card."""
