"""Plug-ins for other programs. Imports all below; nothing imports it."""
