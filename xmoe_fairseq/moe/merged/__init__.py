"""MEO's merged experts: layer, gate, merged GEMM, decoding cache, FLOPs."""
