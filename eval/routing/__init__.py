"""Figures of a trained model's routing, counted on real forward passes."""
