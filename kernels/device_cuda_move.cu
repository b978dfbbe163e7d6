/* Words moved by the device itself: tables of a step to where its recording reads them, and results
 * of the one before to the host. Host memory is read and written over the bus, where a copy engine
 * would cost a turn each. */
#include "kernels/device_cuda.cuh"

#define THREADS 256
#define BLOCKS  64 /* of a move, at most */

typedef struct {
    dev_move at[DEV_MOVES];
} move_list;

__global__ void __launch_bounds__(THREADS) move_kernel(const __grid_constant__ move_list list)
{
    const dev_move &m = list.at[blockIdx.y];
    pdl_launch();
    pdl_wait();
    for (int64_t i = blockIdx.x * THREADS + threadIdx.x; i < m.n;
         i += (int64_t)gridDim.x * THREADS) {
        const int64_t from = m.index ? m.index[i] : i;
        if (from < 0) continue;
        const int32_t v = ((const volatile int32_t *)m.from)[from];
        ((volatile int32_t *)m.to)[i] = m.ids && v < 0 ? 0 : v;
    }
}

err_code cuda_move_words(device *d, const dev_move *moves, int n, err *e)
{
    move_list list = {};
    int64_t most = 0;
    for (int i = 0; i < n; i++) {
        list.at[i] = moves[i];
        if (moves[i].n > most) most = moves[i].n;
    }
    if (!most) return OK;
    const int64_t blocks = (most + THREADS - 1) / THREADS;
    return cuda_launch(d, "move", move_kernel,
                       dim3((unsigned)(blocks < BLOCKS ? blocks : BLOCKS), (unsigned)n),
                       dim3(THREADS), 0, e, list);
}
