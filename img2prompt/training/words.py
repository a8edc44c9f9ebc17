"""Words of a vocabulary upon embeddings that are there already, where no gradient descent has learnt both together.

# N = images, E = width of the features, V = words of the vocabulary
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from img2prompt.data.labels import Labels
from img2prompt.encoders.encoder import Features
from img2prompt.heads import Head, JointVocabulary

# More images than these would tell the same.
_MOST_IMAGES = 20_000
_STEPS = 60
# Of the squared weights: what few images say of a rare word is not to be believed.
_PENALTY = 1e-4


def fit_words(head: Head, features: Float[Tensor, "N E"], rows: list[int], labels: Labels) -> None:
    """Makes the words of the head what logistic regression finds upon its embeddings of these features."""
    assert isinstance(head, JointVocabulary)
    every = -(-len(rows) // _MOST_IMAGES)
    device = head.words.weight.device
    wanted = labels.of(rows[::every]).to(device)
    was_training = head.training
    with torch.no_grad():
        embeddings = head.eval()(Features(features[::every].to(device))).embedding
    head.train(was_training)
    # Between zero and one: no word is as rare, or as common, as never or always.
    rates = ((wanted.sum(0) + 0.5) / (len(wanted) + 1)).logit()
    with torch.no_grad():
        head.words.weight.zero_()
        head.words.bias.copy_(rates)
    optimizer = torch.optim.LBFGS(head.words.parameters(), max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.binary_cross_entropy_with_logits(head.words(embeddings), wanted) * wanted.shape[1]
        value = value + _PENALTY * head.words.weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    optimizer.zero_grad()
