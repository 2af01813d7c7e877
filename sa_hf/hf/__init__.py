"""The only folder that touches transformers' attention."""
