"""The one room that knows transformers and peft: base models, what of them is adapted, and slices put in and taken out."""
