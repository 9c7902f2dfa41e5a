"""Sampling: the denoising loop, scenes from storyboards, and a durable video service."""
