// Stands in for pair_cuda.cu in builds without CUDA.
#include "common.h"

extern "C" {

int diffforce_has_cuda(void) {
    return 0;
}

int diffforce_pair_operator_cuda(const diffforce_pair_problem*, const void*, const void*,
                                 const void*, const void*, void*, void*, void*, void*, void*) {
    return diffforce::report(DIFFFORCE_NO_CUDA,
                             "this build of diffforce has no CUDA part; configure with "
                             "-DDIFFFORCE_CUDA=ON, or move the tensors to the CPU");
}

}  // extern "C"
