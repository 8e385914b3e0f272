"""Measurements on a GPU. They need one; nothing else imports this."""
