"""Operations that megatron-core could fuse; it is not asked to."""


class FusibleOperation:
    pass


class Sequential:
    pass
