"""A configuration small enough for scripts that train: a YAML of the form of train_configs/."""

from __future__ import annotations

MODEL = """
task: {_name: translation}
criterion: {_name: label_smoothed_cross_entropy_with_load_balance, label_smoothing: 0.1}
optimizer: {_name: adam}
lr_scheduler: {_name: fixed}
model:
  _name: xmoe_transformer_tiny
  encoder_embed_dim: 16
  decoder_embed_dim: 16
  encoder_ffn_embed_dim: 32
  decoder_ffn_embed_dim: 32
  moe_num_experts: 4
  moe_expert_dim: 16
"""
