"""A checkpoint written once and never again: what users have on disk must go on loading."""
import pytest
import torch
from make_golden_checkpoint import FILE, NETWORKS, evaluate


@pytest.fixture(scope='module')
def golden():
    # Tensors and plain containers only: nothing in it can run code on loading.
    content = torch.load(FILE, weights_only=True)
    assert content.keys() == NETWORKS.keys()
    return content


@pytest.mark.parametrize('name', NETWORKS)
def test_loads_strictly_and_computes_what_it_did(name, golden):
    """Names, shapes and types are those of today: what is written now loads in older versions."""
    entry, network = golden[name], NETWORKS[name]()
    assert describe(network.state_dict()) == describe(entry['state_dict'])
    network.load_state_dict(entry['state_dict'], strict=True)
    counts = [value for key, value in network.state_dict().items()
              if key.endswith('num_batches_tracked')]
    assert counts and all(count == 5 for count in counts)
    outputs = evaluate(network, entry['image'])
    assert len(outputs) == len(entry['outputs'])
    for ours, theirs in zip(outputs, entry['outputs']):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def describe(state_dict):
    return {key: (tuple(value.shape), value.dtype) for key, value in state_dict.items()}
