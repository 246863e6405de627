"""Figures of a trained model's routing, counted on real forward passes; eval.analyse and eval.serve use them."""
