"""What is measured and penalised between the experts of a layer: pure functions on arrays.

`gram` has the algebra of pairwise cosines, `weights` compares the experts' parameters, `subspace`
finds the leading directions that its spectral form needs, `outputs` compares what experts do to the
same tokens. Letters: B batch, T tokens, D model, E experts, L layers, R rank, K the other side of a
weight matrix, whatever it is.
"""
