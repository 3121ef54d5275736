"""The field's systems on the pocket model, clean and sick, as a table made by one command."""
