"""What tests of several kinds share: tiny models and a real daemon process."""
