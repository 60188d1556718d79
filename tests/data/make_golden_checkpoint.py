"""Wrote golden_checkpoint.pth, once: small networks with CE, trained a little, and their outputs.

    python tests/data/make_golden_checkpoint.py

Kept to show how the file came about. Running it again would replace what is meant to stay.
"""
from pathlib import Path

import torch
from golden_networks import NETWORKS

FILE = Path(__file__).parent / 'golden_checkpoint.pth'


def main():
    if FILE.exists():
        raise SystemExit(f'{FILE} is there, and is meant to stay as it is')
    torch.manual_seed(0)
    golden = {}
    for name, build in NETWORKS.items():
        network = build()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        for _ in range(5):
            features = network(torch.randn(4, 3, 32, 32))
            optimizer.zero_grad()
            sum(feature.square().mean() for feature in as_tuple(features)).backward()
            optimizer.step()
        state_dict = {key: value.clone() for key, value in network.state_dict().items()}
        image = torch.randn(2, 3, 32, 32)
        outputs = evaluate(network, image)
        golden[name] = dict(state_dict=state_dict, image=image, outputs=outputs)
    torch.save(golden, FILE)


@torch.no_grad()
def evaluate(network, image):
    """In float64, so that the outputs do not depend on the machine."""
    network.double().eval()
    return as_tuple(network(image.double()))


def as_tuple(features):
    return features if isinstance(features, tuple) else (features, )


if __name__ == '__main__':
    main()
