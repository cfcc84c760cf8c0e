"""Known GPUs by their makers' data sheets, for MFU and for planning.

Dense figures, without sparsity. What a program gets of them is an assumption (`Assumptions`): this
code has run on no GPU.
"""

from dataclasses import dataclass

# Name as torch reports it (the first entry contained in it counts) -> BF16 tensor-core FLOP/s.
_BF16_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
)


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node, and its share of what connects it. Bandwidths are of one direction."""

    name: str
    bf16: float
    """FLOP/s."""
    memory: float
    """Bytes, a GB of the data sheet being 10**9."""
    memory_bandwidth: float
    """Bytes per second."""
    nvlink: float
    """Bytes per second to the other GPUs of the node."""
    network: float
    """Bytes per second of its network adapter to other nodes."""


# SXM modules in the maker's own servers, one InfiniBand adapter per GPU. Data sheets of NVIDIA:
# "A100 80GB" (312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both directions), "DGX A100" (8 x 200 Gb/s);
# "H100" (989.4, 3.35 TB/s, 900 GB/s), "DGX H100" (8 x 400 Gb/s); "H200" (989.4, 141 GB, 4.8 TB/s,
# 900 GB/s); "DGX B200" (8 GPUs: 36 PFLOP/s dense FP8, half of it BF16; 1,440 GB, 64 TB/s, NVLink
# 1.8 TB/s each; 8 x 400 Gb/s).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12, 80e9, 2.039e12, 300e9, 25e9),
        Gpu("h100", 989e12, 80e9, 3.35e12, 450e9, 50e9),
        Gpu("h200", 989e12, 141e9, 4.8e12, 450e9, 50e9),
        Gpu("b200", 2250e12, 180e9, 8e12, 900e9, 50e9),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """Shares of a data sheet that a program gets. None of them was measured with this code."""

    products: float = 0.70
    """Of the peak in matrix products. Published measurements on H100 and A100 lie between 0.7 and
    0.8 for large ones."""
    attention: float = 0.50
    """Of the peak in attention kernels, forward and backward; flash-attn 3 publishes 0.55 to 0.65
    on H100, flash-attn 2 less."""
    memory: float = 0.85
    """Of the memory's bandwidth."""
    links: float = 0.80
    """Of the bandwidth of NVLink and network."""
    launch_seconds: float = 10e-6
    """The host's time for one kernel of eager PyTorch, Python and autograd included."""
    hop_seconds: float = 5e-6
    """What a message takes from one rank of a ring to the next, however short it is."""


@dataclass(frozen=True)
class Cluster:
    """Equal nodes: seconds that a rank needs for operations, bytes and messages."""

    gpu: Gpu
    gpus_per_node: int = 8
    assumed: Assumptions = Assumptions()

    def products(self, flops: float) -> float:
        return flops / (self.gpu.bf16 * self.assumed.products)

    def attention(self, flops: float) -> float:
        return flops / (self.gpu.bf16 * self.assumed.attention)

    def memory(self, num_bytes: float) -> float:
        """Seconds of kernels that read and write so many bytes."""
        return num_bytes / (self.gpu.memory_bandwidth * self.assumed.memory)

    def launches(self, count: float) -> float:
        """Seconds that the host needs to launch so many kernels."""
        return count * self.assumed.launch_seconds

    def ring(self, num_bytes: float, ranks: int, stride: int = 1, calls: float = 1) -> float:
        """Seconds of collectives in which a rank of a ring sends so many bytes.

        Between nodes a ring enters and leaves through the adapters of all its ranks in a node.

        Args:
            num_bytes: that one rank sends, over all calls.
            ranks: of the group; one alone sends nothing.
            stride: from one rank of the group to the next, in the world.
            calls: a half of an all-reduce counts as one.
        """
        if ranks == 1:
            return 0.0
        bandwidth = self.gpu.nvlink
        if ranks * stride > self.gpus_per_node:
            in_node = max(1, self.gpus_per_node // stride)
            bandwidth = min(bandwidth, in_node * self.gpu.network)
        hops = calls * (ranks - 1) * self.assumed.hop_seconds
        return num_bytes / (bandwidth * self.assumed.links) + hops

    def send(self, num_bytes: float, distance: int) -> float:
        """Seconds of a message to a rank so far away in the world."""
        far = distance >= self.gpus_per_node
        bandwidth = self.gpu.network if far else self.gpu.nvlink
        return num_bytes / (bandwidth * self.assumed.links) + self.assumed.hop_seconds


def bf16_peak(device_name: str) -> float | None:
    """Dense BF16 FLOP/s of a GPU model, None for one that is not in the table."""
    return next((peak for name, peak in _BF16_PEAKS if name in device_name), None)


def device_peak(precision: str) -> float | None:
    """FLOP/s that MFU is measured against on this rank's device; None where it has no meaning.

    FP8 runs are measured against the BF16 peak too: only some of their products are FP8, and the
    figure stays comparable. FP32 runs and CPUs have none.
    """
    import torch  # here: a command line knows the names of GPUs without waiting for it

    if precision != "bf16" or not torch.cuda.is_available():
        return None
    return bf16_peak(torch.cuda.get_device_name())
