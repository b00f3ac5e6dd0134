// Loads an exported student and prints its probabilities for one raw picture (uint8, H x W x 3).
//
//     judge student.ts picture.raw HEIGHT WIDTH
//
// Built by tests/test_edge.py against the installed torch; libtorch serves as well.

#include <torch/script.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

int main(int argc, char** argv) {
    if (argc != 5) {
        std::fprintf(stderr, "usage: judge student.ts picture.raw HEIGHT WIDTH\n");
        return 2;
    }
    const long height = std::stol(argv[3]), width = std::stol(argv[4]);
    std::ifstream file(argv[2], std::ios::binary);
    std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
    if (static_cast<long>(bytes.size()) != height * width * 3) {
        std::fprintf(stderr, "%s: not %ld x %ld x 3 bytes\n", argv[2], height, width);
        return 2;
    }
    c10::InferenceMode guard;
    torch::jit::Module student = torch::jit::load(argv[1]);
    torch::Tensor picture = torch::from_blob(bytes.data(), {height, width, 3}, torch::kUInt8);
    torch::Tensor probabilities = student.forward({picture}).toTensor()[0].contiguous();
    for (long k = 0; k < probabilities.size(0); ++k) {
        std::printf("%.6f\n", probabilities[k].item<float>());
    }
}
