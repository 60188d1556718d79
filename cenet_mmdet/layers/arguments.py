"""Checks of the arguments that the layers share; each names the argument and its range."""


def check_integers(**arguments: int) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f'{name} must be an integer >= 1, got {value!r}')


def check_eps_and_momentum(eps: float, momentum: float) -> None:
    if not 0 < eps < float('inf'):
        raise ValueError(f'eps must be a positive number, got {eps!r}')
    if not 0 <= momentum <= 1:
        raise ValueError(f'momentum must lie in [0, 1], got {momentum!r}')
