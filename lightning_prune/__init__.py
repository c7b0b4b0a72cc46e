"""Structured pruning inside PyTorch Lightning's fit."""
